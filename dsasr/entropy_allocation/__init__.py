"""Entropy allocation: which part of the transcript's uncertainty which part of the model resolves.

Tensors in, `row.AllocationRow` out: NSE and effective rank (`nse`), PAI and CSAI
(`pai_csai`), CKA (`cka`), predictive entropies and H₀ − H₁ (`predictive_entropy`).
"""
