"""Files with LoRA adapters, read and written.

peft.py            PEFT's folder
keras_hub_lora.py  KerasHub's `.lora.h5` file
"""
