"""Text to token ids and back: tokenizers from Hugging Face folders and GGUF files, chat templates, detokenizers.

Everything here is host code: it imports neither JAX, torch nor transformers, and nothing of the package but errors.
`weights` builds a `Tokenizer`; the server, training, evaluation and generation use it. Tokenizers are immutable and shared
between threads without a lock; a `Detokenizer` belongs to one choice and is used by one thread at a time.
"""
