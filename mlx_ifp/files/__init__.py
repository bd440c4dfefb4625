"""Files: text, JSON lines and safetensors, and how a file is written whole or not at all."""
