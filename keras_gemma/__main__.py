"""Entry point of `python -m keras_gemma`, same as the command `keras-gemma`."""

import sys

from keras_gemma.cli import main

sys.exit(main())
