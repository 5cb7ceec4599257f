"""Model weights on disk: where a source is found, and how each file format becomes tensors under Hugging Face names.

`sources` opens a source as a `checkpoint.Checkpoint`, whose tensors are host arrays; `names` maps tensor names to
parameter paths, and `load` puts tensors on devices. `sources` and the readers import no JAX. Share, training and the
compilation cache call this room. It holds no lock: files in caches are written under a temporary name, then renamed.
"""
