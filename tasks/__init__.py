"""What the assistant learns and practises: problems.py, factbook.py and conversations.py.

A reader of the course can skip this package: train.py, sft.py and rl.py only take its problems and
conversations.
"""
