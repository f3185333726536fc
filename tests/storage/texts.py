"""Texts with spaces, control tokens and rare characters, for tests of tokenizers."""

TEXTS = [
    "To be, or not to be.",
    "  the slings  and   arrows    of     outrageous      fortune ",
    "lines\n\n\n\n\n\nand\ttabs\t\t\r\n",
    "naïve café, 日本語, 😀👩‍👩‍👧, \x00\x07",
    "12345 67,890.12",
    "<start_of_turn>user\nsleep, perchance<end_of_turn>\n<start_of_turn>model\n",
    "<mask><unused7><unused70> <2mass>[@BOS@]",
    "<start_of_turn <end_of_turn>> <0x41> <unk",
    "ssssssss eeeee ........ ,,,,",
    "a",
    "",
]
