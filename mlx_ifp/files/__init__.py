"""Files: written whole or not at all, JSON lines, safetensors."""
