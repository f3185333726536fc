"""Files of LoRA adapters.

peft.py             folders of peft, read and written
keras_hub_lora.py   KerasHub's `.lora.h5` files, read and written
"""
