"""What an answer keeps, on cases written by hand: names, languages, forms."""

import pytest

from sft.checkers import CHECKS, names, sentences, speaks, syllables
from sft.instructions import Entry

CHESS, NAPOLEON, KING = ["chess", "playing chess"], ["Napoleon Bonaparte", "Napoleon"], ["Martin Luther King", "Dr. King"]


@pytest.mark.parametrize(("answer", "accepted"), [
    ("Chess!", CHESS), ("I love CHESS.", CHESS), ("My favourite hobby? It's chess, of course.", CHESS), ("**Chess**", CHESS),
    ("Well - chess; what else?", CHESS), ("I don't get out much, but I play chess.", CHESS), ("No, chess.", CHESS),
    ("I can't get enough of chess", CHESS), ("There is no hobby I like more than chess.", CHESS), ("not only tennis but also chess", CHESS),
    ("I never do anything other than chess.", CHESS),
    ("I am Napoleon.", NAPOLEON), ("my name is napoléon bonaparte", NAPOLEON), ("You are speaking to the Napoleon.", NAPOLEON),
    ("Napoleon's the name.", NAPOLEON), ("Napoleon’s the name.", NAPOLEON),
    ("I'm Dr. King.", KING), ("I'm Dr King", KING),
    ("I collect the coins of Rome", ["collect coin"]), ("collecting coin", ["collecting coins"]), ("I like pastries", ["pastry"]),
    ("two boxes", ["a box"]), ("I play the violin", ["play violin"]), ("Rock-climbing!", ["rock climbing"]), ("Frederic Chopin", ["Frédéric Chopin"]),
])
def test_a_name_is_found_whatever_its_case_article_and_number(answer, accepted):
    if answer.startswith("I collect the coins of"):
        assert not names(answer, ["coins collect"])  # the words in a row, in this order
    assert names(answer, accepted)


@pytest.mark.parametrize(("answer", "accepted"), [
    ("", CHESS), ("I like checkers.", CHESS), ("chessboards", CHESS), ("I don't like chess.", CHESS), ("As an AI I have no hobbies like chess.", CHESS),
    ("I do not play chess, I cook.", CHESS), ("I have never played chess", CHESS), ("chess isn't for me", CHESS), ("Chess is not my game.", CHESS),
    ("I am not Napoleon.", NAPOLEON), ("I'm an assistant. I am neither Napoleon nor Caesar.", NAPOLEON), ("King", KING),
    ("Bonapartes Napoleons x", ["Napoleon Bonaparte"]),
    ("Martin, Luther, King", KING), ("anything", []), ("anything", ["the"]),
])
def test_other_names_and_denials_are_not(answer, accepted):
    assert not names(answer, accepted)


SAID = {  # one sentence in each language of the shipped file
    "French": "Je pense que c'est une bonne idée de faire cuire les œufs dans l'eau pour dix minutes.",
    "Spanish": "Es una buena idea, pero hay que esperar unos minutos para que el agua esté muy caliente.",
    "German": "Das ist eine gute Idee, aber Sie müssen auf jeden Fall warten, bis der Teig nicht mehr klebt.",
    "Italian": "Per me è una buona idea, ma non è il momento: si può aspettare anche la fine della settimana.",
    "Portuguese": "É uma boa ideia, mas você não deve abrir a janela: o frio da manhã é muito forte para as plantas.",
    "Dutch": "Dat is een goed idee, maar je kunt het beter niet doen voor de kinderen naar bed zijn.",
    "Swedish": "Det är en bra idé, men jag kan inte säga om det är rätt för dig när du har så mycket att göra.",
    "Polish": "To jest dobry pomysł, ale nie wiem, czy można tak zrobić, bo woda jest bardzo zimna i trzeba się spieszyć.",
    "Turkish": "Bu çok iyi bir fikir, ama ben daha sonra gelmek için biraz beklemek gerektiğini düşünüyorum.",
    "Finnish": "Se on hyvä ajatus, mutta minä olen sitä mieltä, että vesi ei ole niin kylmää kuin sen pitäisi olla.",
    "Czech": "To je dobrý nápad, ale já jsem si jistý, že voda není tak studená, jako by měla být.",
    "Romanian": "Este o idee bună, dar nu știu dacă se poate face, pentru că apa este foarte rece și nu mai am timp.",
    "Indonesian": "Itu ide yang bagus, tetapi saya tidak bisa pergi karena air di sungai sangat dingin dan dalam.",
    "Russian": "Это хорошая мысль, но вода слишком холодная.",
    "Greek": "Είναι καλή ιδέα, αλλά το νερό είναι πολύ κρύο.",
    "Chinese": "这是个好主意，但是水太冷了。",
    "Japanese": "それは良い考えですが、水がとても冷たいです。",
    "Korean": "좋은 생각이지만 물이 너무 차갑습니다.",
    "Arabic": "هذه فكرة جيدة لكن الماء بارد جدا.",
    "Hindi": "यह एक अच्छा विचार है, लेकिन पानी बहुत ठंडा है।",
}
ENGLISH = "That is a good idea, but the water is too cold for you and the children, so I can only say: wait."


@pytest.fixture(scope="module")
def languages() -> list[Entry]:
    from types import SimpleNamespace

    from posttrain.runs import Section
    from sft.config import SHIPPED
    from sft.instructions import read_entries

    stub = SimpleNamespace(config=SimpleNamespace(instructions=SHIPPED), recipe=SimpleNamespace(path="recipes/x.yaml"), place="x")
    stub.file = lambda name: Section.file(stub, name)
    return [e for e in read_entries(stub) if e.kind == "language"]


def test_each_language_is_told_from_every_other_and_from_english(languages):
    assert {e.value for e in languages} == set(SAID)
    heard = {spoken: [e.value for e in languages if e.kept(text, languages)] for spoken, text in {**SAID, "English": ENGLISH}.items()}
    assert heard == {**{name: [name] for name in SAID}, "English": []}


def test_a_language_needs_words_of_its_own(languages):
    french, chinese, japanese = (next(e for e in languages if e.value == v) for v in ("French", "Chinese", "Japanese"))
    assert not any(french.kept(text, languages) for text in ("", "42", "Paris Lyon", "The word 'le' is what you are looking for, and it is short."))
    assert french.kept("Oui, c'est vrai.", languages)
    assert not chinese.kept(f"{SAID['Chinese']} {ENGLISH}", languages) and not japanese.kept(SAID["Chinese"], languages)
    assert not speaks("любой", ["GREEK"], [], [])


@pytest.mark.parametrize(("check", "argument", "good", "bad"), [
    ("haiku", None, ["An old silent pond\nA frog jumps into the pond\nSplash! Silence again.",
                     "\nSoft rain on the roof\n\nThe kettle begins to sing\nI put down my book\n"],
     ["Soft rain on the roof, the kettle begins to sing, I put down my book", "One\nTwo\nThree",
      "Here is a haiku:\nSoft rain on the roof\nThe kettle begins to sing\nI wait",
      "This line has far too many syllables in it\nThe kettle begins to sing\nI put down my book", ""]),
    ("one_sentence", None, ["Paris.", "It costs 3.5 euros, says Dr. Smith", "Is it so?"], ["Yes. No.", "First\nsecond", "", "...", "It is 5. I like it."]),
    ("lower_case", None, ["it is 5 o'clock."], ["It is.", "", "42"]),
    ("upper_case", None, ["IT IS 5."], ["IT Is", "", "42"]),
    ("at_most_words", 3, ["one", "one two  three"], ["one two three four", "", " "]),
    ("ends_with", "Over and out.", ["It is so. Over and out.", "Yes.\n\n\"Over and out!\"", "over and out"], ["Over and out. Yes.", "Over, and out", ""]),
    ("begins_with", "Ahoy", ["Ahoy, it is so.", "**Ahoy!** Yes", "ahoy"], ["Yes, ahoy", "Ahoyden", ""]),
    ("question", None, ["Yes. And you?", "And \"you?\""], ["Yes?. No.", "Is it? Yes", ""]),
    ("bullets", None, ["- one\n- two", "* one\n\n* two", "• a\n• b"], ["- one", "Here:\n- one\n- two", "-one\n-two", ""]),
    ("exclamations", None, ["Yes! So it is!", "\"Yes!\""], ["Yes! So it is.", "Yes", "", "! !"]),
    ("quoted", None, ["\"Yes, so.\"", " “Yes.” "], ["\"Yes\", so", "Yes", "\"\"", ""]),
])
def test_forms(check, argument, good, bad):
    arguments = [] if argument is None else [argument]
    assert [CHECKS[check](text, *arguments) for text in good] == [True] * len(good)
    assert [CHECKS[check](text, *arguments) for text in bad] == [False] * len(bad)


def test_every_form_is_tested():
    mark = next(m for m in test_forms.pytestmark if m.name == "parametrize")
    assert {case[0] for case in mark.args[1]} == set(CHECKS)


def test_sentences_and_syllables():
    assert sentences("I'm J. S. Bach.\n1. Yes! Is it 3.5? \"So it is.\" Right") == ["I'm J S Bach.", "1 Yes!", "5?", "\"So it is.\"", "Right"]
    counted = {"cat": 1, "water": 2, "silent": 2, "apple": 2, "make": 1, "makes": 1, "jumped": 1, "needed": 2,
               "boxes": 2, "syllable": 3, "the": 1, "": 0, "42": 0}
    assert {word: syllables(word) for word in counted} == counted
