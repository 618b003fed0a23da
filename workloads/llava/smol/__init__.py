"""The pretrained pair `smol`: a small language model and a small vision tower, joined to one LLaVA in the cache."""
