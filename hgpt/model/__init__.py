"""The model, whose code is copied into every export: imports only torch, transformers and this folder, relatively."""
