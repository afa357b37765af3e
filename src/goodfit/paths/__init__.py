"""Paths over λ: the same model under more and more of one regularizer."""
