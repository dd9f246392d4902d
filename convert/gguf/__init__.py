"""GGUF files, in llama.cpp's form: weights in blocks, config, tokenizer and chat template in one file.

A file is shown to the rest of the project as a folder like Hugging Face's (`folder`); its values are dequantized as
they are read, tensor by tensor (`tensors`).
"""

from convert.gguf.folder import as_folder, gguf_files, gguf_names, gguf_parts, open_gguf

__all__ = ["as_folder", "gguf_files", "gguf_names", "gguf_parts", "open_gguf"]
