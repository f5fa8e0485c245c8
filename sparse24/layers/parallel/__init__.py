"""Weights that ranks divide: FSDP2 along rows, tensor parallel along either extent."""
