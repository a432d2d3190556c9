"""(placeholder while plan.py is being written)"""
import math


def batch_and_steps(rows, paper_batch, requested, epochs, max_steps):
    batch = requested or max(1, min(paper_batch, int(rows * epochs // 50)))
    steps = max(1, math.ceil(rows * epochs / batch))
    return batch, min(steps, max_steps) if max_steps else steps
