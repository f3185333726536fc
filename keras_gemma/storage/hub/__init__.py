"""Kaggle and Hugging Face: from a name or handle to a folder, and from a folder to a hub.

locate.py      names, handles and paths to a folder
downloads.py   downloads with the hubs' own clients
upload.py      uploads
"""
