"""The files of a checkpoint folder, read without model and process group.

`OUT/checkpoints/model_<iteration>/` contains tensors with flat names (`model.teacher.backbone.cls_token`,
`optimizer.student.backbone.cls_token.exp_avg`), each in one or more chunks in the files `__<rank>_<n>.distcp`, their
index `.metadata`, `state.json`, and `checksums.json` for these two; each chunk of a tensor has its own checksum.
Folders are not trusted: reading them runs no code, and damage is detected.

`index` and `tensors` use `torch.distributed.checkpoint`, which takes half as long to import as PyTorch itself: they are
imported where tensors are read. `folder` and `state` do not.
"""
