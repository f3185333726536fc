"""Texts that train the vocabulary of these tests, and texts to tokenize."""

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n",
    "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate.\n\n",
    "<start_of_turn>user\nWhat is 12 and 345?<end_of_turn>\n<start_of_turn>model\n",
    "def fox(dog):\n    return    dog + 1\n\t# a tab, née à Genève\n",
]

TEXTS = [
    "The quick brown fox jumped.",
    "  leading and trailing  ",
    "12345 tabs\tand\n\n\n\n\n\nlines\r\n",
    "naïve café, 日本語 and 😀",
    "<start_of_turn>user\nhi<end_of_turn>\n",
    "a",
    "",
]
