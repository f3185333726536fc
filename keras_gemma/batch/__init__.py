"""Many prompts, from a list or a file, with the engine's slots always full.

generate.py      prompts to texts, as each is finished
request_file.py  the same for JSON-lines files, which resumes
"""

from keras_gemma.batch.generate import BatchOutput, generate_batch
from keras_gemma.batch.request_file import generate_file

__all__ = ["BatchOutput", "generate_batch", "generate_file"]
