"""Data: formats and sources, batches, the doctor, label noise. Nothing here knows a trainer."""
