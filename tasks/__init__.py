"""What the assistant learns and practises: problems.py, factbook.py, conversations.py and their texts.jsonl.

A reader of the course can skip this package. sft.py takes conversations from it, rl.py problems.
"""
