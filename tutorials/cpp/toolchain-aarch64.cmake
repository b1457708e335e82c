# Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu, and for libjpeg and libpng of that architecture
#   dpkg --add-architecture arm64 && apt-get update && apt-get install libjpeg-dev:arm64 libpng-dev:arm64
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_LIBRARY_ARCHITECTURE aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
