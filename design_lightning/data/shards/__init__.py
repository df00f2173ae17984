"""WebDataset shards: images in tar files, with an index that says where in them each image lies."""
