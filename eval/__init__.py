"""Evaluation: readers, fine-tuning, scores and statistics for `python -m eval`.

A task is a module here, and its name stands in tasks.TASKS; nothing else lists it. The module has

    load(folder, splits=None)    {language: {split: [examples]}} of one data set, mostly one call of tasks.collect, which
                                 is told the file endings and how to read one file
    HEAD                         a finetune.Task: what the model reads, the loss, the epochs, the score and its columns

So to add part-of-speech tagging: write eval/pos.py, for which nli.py is the shortest example, and add "pos" to
tasks.TASKS. Then `python -m eval run` finds its data in DIR/pos/<data set>/, and reports, `compare`, the page and the
ladder have it too. An example with a field `article` never has another one of that article on the other side of a split.
"""
