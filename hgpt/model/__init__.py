"""The model, and all that travels with an export: relative imports of this folder, torch and transformers only."""
