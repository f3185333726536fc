"""KerasHub's preset folder.

layout.py  file names, registered names, H5 paths and shapes
reader.py  reads a folder
writer.py  writes a folder
"""
