"""Curation of images by their features: duplicates, test images in the training data, balance, retrieval.

`python -m dinov2.curate` is the command. `feature_table` reads features, more of them than fit into memory, `search`
finds neighbors, `groups` joins them to groups; `duplicates`, `decontaminate`, `balance` (by the clusters of `clusters`)
and `retrieve` select images; `outputs` writes lists of them, `page` a page of examples, whose images `images` opens.

Sources: Oquab et al., *DINOv2*, arXiv 2304.07193, section 3 and appendix A; Vo et al., *Automatic Data Curation for
Self-Supervised Learning: A Clustering-Based Approach*, arXiv 2405.15613.
"""
