"""From files to arrays on the host: readers, tokenizers, batches, and a generated corpus to run
everything offline.
"""
