"""Evaluation: the accuracy of decode modules on tasks whose answers a verifier scores.

Tasks (reasoning-gym, BFCL, data files), verifiers, and `pshare-evaluate`, which runs them on an engine, so that modules
share prefixes and batches; there is no generation loop here. Experiments call it; it stands on engine, share, text and
training's data and model card. Nothing here locks: an evaluation steps its own engine in the calling thread.
"""
