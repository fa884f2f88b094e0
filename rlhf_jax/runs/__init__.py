"""The folder of a run: its files, checkpoints, records, and the devices and processes that share
it.
"""
