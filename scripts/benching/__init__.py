"""What `make bench` measures (cases), where (worker, contenders), against which limit, and how it is shown."""
