"""Files: written whole or not at all, text, JSON lines, safetensors."""
