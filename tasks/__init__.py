"""What the assistant learns and practises: problems.py, factbook.py, conversations.py and their texts.jsonl.

countries.py reads the World Factbook, of which facts and pretraining are made.

A reader of the course can skip this package. sft.py takes conversations from it, rl.py problems.
"""
