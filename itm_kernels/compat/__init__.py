"""Drop-ins for published code: the same names, argument order and option names, the same numbers.

=========  ===================================================================
``scan``   ``xattn_score_t2i``, ``xattn_score_i2t``, ``ContrastiveLoss``
``bfan``   ``xattn_score``, ``ContrastiveLoss``
``pfan``   ``xattn_score_t2i``, ``xattn_score_i2t``, ``ContrastiveLoss``
``chan``   ``hard_assignment_scores``
``sgraf``  ``EncoderSimilarity``, ``ContrastiveLoss``
``rcar``   ``EncoderSimilarity``, ``ContrastiveLoss``
=========  ===================================================================

``opt`` is the published ``argparse.Namespace`` (any object with its attributes). Only the options that a function
reads have to be there.
"""
