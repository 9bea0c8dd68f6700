"""Where images come from: encoded bytes and stable ids, from folders, lists, tar, Parquet or memory."""
