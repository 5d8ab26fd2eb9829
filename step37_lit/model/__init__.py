"""The model: one file a part, `step37_model.py` joins them."""
