"""Reading and writing: files, images, assets."""
