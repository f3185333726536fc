"""KerasHub's preset folders.

layout.py   names, paths and shapes
reader.py   reads a folder
writer.py   writes a folder
"""
