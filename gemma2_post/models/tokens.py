"""Gemma's control tokens and their ids, in a module of their own that imports nothing slow."""

SPECIAL_TOKENS = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<start_of_turn>": 106, "<end_of_turn>": 107}
EOS, BOS, PAD, END_OF_TURN = 1, 2, 0, 107
STOP_TOKEN_IDS = [EOS, END_OF_TURN]
"""Always both: a Gemma 2 turn ends with `<end_of_turn>`, a conversation with `<eos>`."""
