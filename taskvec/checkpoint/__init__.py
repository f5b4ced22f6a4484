"""WHERE THE BYTES ARE: files, headers, model folders. Nothing here knows what a task vector is."""
