"""Trained text models as other programs take them: adapters merged into their base, and GGUF files for llama.cpp."""
