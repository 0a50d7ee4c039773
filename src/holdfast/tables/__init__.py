"""What commands print as tables, with the words and numbers of the page: one file each."""
