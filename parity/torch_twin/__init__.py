"""The second reading of the same notes: Ling 2.0 / Ring 2.0, IcePop and AdamW in PyTorch (bailing_moe_v2.md 2, 3)."""
