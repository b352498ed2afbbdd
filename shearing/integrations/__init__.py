"""Mask learning under other trainers, on public names only: MosaicML's Composer, Hugging Face's Trainer."""
