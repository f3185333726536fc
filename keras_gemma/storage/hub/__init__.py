"""Kaggle and Hugging Face: finding, downloading and uploading presets.

locate.py     a name, handle or path to a folder
downloads.py  a handle to a folder, through the hubs' own clients
installed.py  packages with the parts of a file to the file
upload.py     a folder to Kaggle or Hugging Face
errors.py     errors of the clients to advice
"""
