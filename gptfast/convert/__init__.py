"""A model's way in and out: Hugging Face's format, the reference's, and one file of our own.

Every format is read into a TrainedModel and written from one (trained.py). What is read was made by
others: names, shapes and values are checked, and nothing that a file says is ever executed.
"""
