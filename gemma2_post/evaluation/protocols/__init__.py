"""Published protocols of evaluation, on local files of those projects' layouts."""
