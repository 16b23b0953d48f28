"""What a result looks like: the HTML report, its figures and its words."""
