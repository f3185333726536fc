"""`python -m keras_gemma`: the command `keras-gemma`."""

import sys

from keras_gemma.cli import main

sys.exit(main())
