"""What `make bench` measures (cases), where (worker, contenders), against which limit, and how it is shown.

The modules image_*, and images, are those of `make bench-images`.
"""
