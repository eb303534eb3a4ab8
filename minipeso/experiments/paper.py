"""What the paper reports (arXiv 2510.25093 v1). Its data and model are others: compare signs and order alone."""
# Table 1, Instruments: gain over single evolving LoRA in NDCG@5, per cent: (user-disjoint, natural)
TABLE_1 = {
    "sumlora-all": (-8.13, -26.77), "sumlora-latest": (-12.20, -22.05), "sumlora-all-inherit": (-3.25, 1.57),
    "sumlora-latest-inherit": (0.00, 2.36), "sdlora-latest-inherit": (3.25, 0.79)}
# Table 2, Instruments: Hit@5, Hit@10, NDCG@5, NDCG@10
TABLE_2 = {
    "pretrain": (0.0166, 0.0216, 0.0115, 0.0131), "single": (0.0181, 0.0253, 0.0127, 0.0150),
    "inflora-all": (0.0156, 0.0214, 0.0105, 0.0124), "inflora-latest": (0.0131, 0.0167, 0.0090, 0.0102),
    "inflora-all-inherit": (0.0149, 0.0219, 0.0104, 0.0126), "inflora-latest-inherit": (0.0137, 0.0202, 0.0095, 0.0116),
    "sumlora-all": (0.0134, 0.0215, 0.0093, 0.0119), "sumlora-latest": (0.0143, 0.0221, 0.0099, 0.0124),
    "sumlora-all-inherit": (0.0182, 0.0260, 0.0129, 0.0154), "sumlora-latest-inherit": (0.0185, 0.0255, 0.0130, 0.0152),
    "sdlora-all": (0.0156, 0.0226, 0.0107, 0.0129), "sdlora-latest": (0.0156, 0.0218, 0.0102, 0.0123),
    "sdlora-all-inherit": (0.0176, 0.0238, 0.0124, 0.0144), "sdlora-latest-inherit": (0.0184, 0.0254, 0.0128, 0.0150),
    "peso": (0.0193, 0.0268, 0.0138, 0.0162)}
TABLE_5 = [*(f"lightgcn-{x}" for x in "pretrain finetune contrastive piw pisa".split()), "pretrain", "single", "peso"]
TABLE_3 = [name for name in TABLE_5 if name not in ("lightgcn-contrastive", "lightgcn-piw")]
