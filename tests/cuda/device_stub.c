/* A CUDA device that computes nothing.
 *
 * This library has the functions of the CUDA runtime and driver, cuBLAS, cuSOLVER and NCCL that PyTorch calls. Preloaded,
 * it makes PyTorch see GPUs of type H200 and run everything that it runs on the host: dispatcher, autocast, caching
 * allocator, streams, events, sync-debug mode, sharding, ProcessGroupNCCL, compilers. Device memory is reserved and never
 * written, so that all numbers are zeros there. Kernels and matrix products are counted by name and not run, copies are
 * counted. Functions that are not here are generated at build time and return 0.
 */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#undef cudaGetDeviceProperties
#undef cudaStreamGetCaptureInfo

/* --- Counters ---------------------------------------------------------------------------------------------------- */

/* In the order of COUNTERS in rehearsal.py. */
enum {
    KERNELS,
    PRODUCTS,
    COLLECTIVES,
    COPIES_TO_DEVICE,
    COPIES_TO_HOST,
    COPIES_ON_DEVICE,
    PAGEABLE_COPIES,
    SYNCHRONIZATIONS,
    EVENT_WAITS,
    NUM_COUNTERS
};

typedef struct {
    const void *key; /* address of a kernel, or of the name of a function */
    const char *name;
    unsigned long long calls;
} Entry;

enum { NUM_ENTRIES = 1 << 18 };
static Entry entries[NUM_ENTRIES]; /* a hash table with linear probing */
static unsigned long long counters[NUM_COUNTERS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void add(int counter) {
    __atomic_fetch_add(&counters[counter], 1, __ATOMIC_RELAXED);
}

/* To be called with the lock. */
static Entry *find_entry(const void *key) {
    size_t index = ((size_t)key >> 3) * 2654435761u % NUM_ENTRIES;
    while (entries[index].key && entries[index].key != key)
        index = (index + 1) % NUM_ENTRIES;
    entries[index].key = key;
    return &entries[index];
}

static void register_name(const void *key, const char *name) {
    pthread_mutex_lock(&lock);
    find_entry(key)->name = name;
    pthread_mutex_unlock(&lock);
}

static void call(const void *key, int counter) {
    add(counter);
    pthread_mutex_lock(&lock);
    find_entry(key)->calls++;
    pthread_mutex_unlock(&lock);
}

void rehearsal_reset(void) {
    pthread_mutex_lock(&lock);
    for (int index = 0; index < NUM_ENTRIES; index++)
        entries[index].calls = 0;
    memset(counters, 0, sizeof counters);
    pthread_mutex_unlock(&lock);
}

void rehearsal_counters(unsigned long long *values) {
    memcpy(values, counters, sizeof counters);
}

/* Writes the number of calls and the name of everything called since the last reset. */
void rehearsal_write_calls(const char *path) {
    FILE *file = fopen(path, "w");
    if (!file)
        return;
    for (int index = 0; index < NUM_ENTRIES; index++)
        if (entries[index].calls)
            fprintf(file, "%llu %s\n", entries[index].calls, entries[index].name ? entries[index].name : "?");
    fclose(file);
}

/* --- Memory ------------------------------------------------------------------------------------------------------ */

typedef enum { PAGEABLE, PINNED, DEVICE } Kind;

typedef struct {
    char *start;
    size_t size;
    Kind kind;
    int device;
} Range;

static Range *ranges;
static int num_ranges, max_ranges;
static const size_t total_memory = (size_t)143771 << 20; /* bytes of an H200 */
static size_t used_memory[64];
static __thread int current_device;

static void add_range(void *start, size_t size, Kind kind) {
    pthread_mutex_lock(&lock);
    if (num_ranges == max_ranges)
        ranges = realloc(ranges, sizeof(Range) * (max_ranges = 2 * max_ranges + 64));
    ranges[num_ranges++] = (Range){start, size, kind, current_device};
    pthread_mutex_unlock(&lock);
}

static Range find_range(const void *address) {
    Range found = {0};
    pthread_mutex_lock(&lock);
    for (int index = 0; index < num_ranges; index++)
        if ((char *)address >= ranges[index].start && (char *)address < ranges[index].start + ranges[index].size)
            found = ranges[index];
    pthread_mutex_unlock(&lock);
    return found;
}

static Range remove_range(const void *start) {
    Range found = {0};
    pthread_mutex_lock(&lock);
    for (int index = 0; index < num_ranges; index++)
        if (ranges[index].start == start) {
            found = ranges[index];
            ranges[index] = ranges[--num_ranges];
            break;
        }
    pthread_mutex_unlock(&lock);
    return found;
}

/* Address space, of which only pages that are written to take memory. */
static void *reserve(size_t size, Kind kind) {
    size = ((size ? size : 1) + 4095) & ~(size_t)4095;
    void *start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED)
        return NULL;
    add_range(start, size, kind);
    return start;
}

static void release(void *start) {
    Range range = remove_range(start);
    if (range.kind == DEVICE)
        used_memory[range.device] -= range.size;
    if (range.start)
        munmap(range.start, range.size);
}

cudaError_t cudaMalloc(void **start, size_t size) {
    *start = used_memory[current_device] + size > total_memory ? NULL : reserve(size, DEVICE);
    if (!*start)
        return cudaErrorMemoryAllocation;
    used_memory[current_device] += find_range(*start).size;
    return cudaSuccess;
}

cudaError_t cudaFree(void *start) {
    release(start);
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **start, size_t size, unsigned flags) {
    *start = reserve(size, PINNED);
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *start) {
    release(start);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *start, size_t size, unsigned flags) {
    add_range(start, size, PINNED);
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *start) {
    remove_range(start);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *available = total_memory - used_memory[current_device];
    *total = total_memory;
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address) {
    static const enum cudaMemoryType types[] = {cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice};
    Range range = find_range(address);
    memset(attributes, 0, sizeof *attributes);
    attributes->type = types[range.kind];
    attributes->device = range.device;
    attributes->devicePointer = range.kind == DEVICE ? (void *)address : NULL;
    attributes->hostPointer = range.kind ? (void *)address : NULL;
    return cudaSuccess;
}

static void copy(void *target, const void *source, size_t size) {
    Kind to = find_range(target).kind, from = find_range(source).kind;
    if (to == DEVICE && from == DEVICE) {
        add(COPIES_ON_DEVICE);
        return;
    }
    add(to == DEVICE ? COPIES_TO_DEVICE : COPIES_TO_HOST);
    if ((to == DEVICE ? from : to) == PAGEABLE)
        add(PAGEABLE_COPIES);
    if (to != DEVICE)
        memcpy(target, source, size);
}

cudaError_t cudaMemcpy(void *target, const void *source, size_t size, enum cudaMemcpyKind kind) {
    copy(target, source, size);
    add(SYNCHRONIZATIONS);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(
    void *target, const void *source, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    copy(target, source, size);
    return cudaSuccess;
}

cudaError_t cudaMemcpyPeerAsync(
    void *target, int target_device, const void *source, int source_device, size_t size, cudaStream_t stream) {
    add(COPIES_ON_DEVICE);
    return cudaSuccess;
}

/* --- Devices ----------------------------------------------------------------------------------------------------- */

/* Number of devices: the environment variable REHEARSAL_DEVICES, or 1. */
static int num_devices(void) {
    const char *text = getenv("REHEARSAL_DEVICES");
    return text ? atoi(text) : 1;
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = num_devices();
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= num_devices())
        return cudaErrorInvalidDevice;
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    *properties = (struct cudaDeviceProp){
        .name = "NVIDIA H200",
        .totalGlobalMem = total_memory,
        .sharedMemPerBlock = 49152,
        .regsPerBlock = 65536,
        .warpSize = 32,
        .maxThreadsPerBlock = 1024,
        .maxThreadsDim = {1024, 1024, 64},
        .maxGridSize = {2147483647, 65535, 65535},
        .textureAlignment = 512,
        .multiProcessorCount = 132,
        .major = 9,
        .minor = 0,
        .pciBusID = 1 + device,
        .unifiedAddressing = 1,
        .memoryBusWidth = 6144,
        .l2CacheSize = 60 << 20,
        .maxThreadsPerMultiProcessor = 2048,
        .sharedMemPerMultiprocessor = 233472,
        .regsPerMultiprocessor = 65536,
        .sharedMemPerBlockOptin = 232448,
        .maxBlocksPerMultiProcessor = 32,
        .concurrentKernels = 1,
        .uuid = {.bytes = {1 + device}},
    };
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp device_properties;
    cudaGetDeviceProperties(&device_properties, device);
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = device_properties.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = device_properties.maxThreadsPerBlock; break;
    case cudaDevAttrWarpSize: *value = device_properties.warpSize; break;
    case cudaDevAttrComputeCapabilityMajor: *value = device_properties.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = device_properties.minor; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = device_properties.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device_properties.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = device_properties.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = device_properties.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxGridDimX: *value = device_properties.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: *value = device_properties.maxGridSize[1]; break;
    case cudaDevAttrMaxGridDimZ: *value = device_properties.maxGridSize[2]; break;
    case cudaDevAttrMaxBlockDimX: *value = device_properties.maxThreadsDim[0]; break;
    case cudaDevAttrMaxBlockDimY: *value = device_properties.maxThreadsDim[1]; break;
    case cudaDevAttrMaxBlockDimZ: *value = device_properties.maxThreadsDim[2]; break;
    case cudaDevAttrL2CacheSize: *value = device_properties.l2CacheSize; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = device_properties.regsPerBlock; break;
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = device_properties.regsPerMultiprocessor; break;
    case cudaDevAttrUnifiedAddressing: *value = 1; break;
    default: *value = 0;
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) {
    snprintf(text, size, "0000:%02x:00.0", 1 + device);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int other) {
    *can = 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) {
    add(SYNCHRONIZATIONS);
    return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t error) {
    return "error of the stub";
}

const char *cudaGetErrorName(cudaError_t error) {
    return "stub";
}

/* --- Streams and events ------------------------------------------------------------------------------------------ */

static int new_handle(void **handle) {
    *handle = calloc(1, 4096);
    return 0;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    return new_handle((void **)stream);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return new_handle((void **)stream);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    add(SYNCHRONIZATIONS);
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges, size_t *num_dependencies) {
    *status = cudaStreamCaptureStatusNone; /* the other results are undefined then */
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    return new_handle((void **)event);
}

cudaError_t cudaEventCreate(cudaEvent_t *event) {
    return new_handle((void **)event);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    add(EVENT_WAITS);
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    *milliseconds = 1.0f;
    return cudaSuccess;
}

/* --- Kernels ----------------------------------------------------------------------------------------------------- */

void **__cudaRegisterFatBinary(void *binary) {
    static void *handle[4];
    return handle;
}

void __cudaRegisterFunction(
    void **handle, const char *kernel, char *device_name, const char *name, int limit, void *thread, void *block,
    void *block_dim, void *grid_dim, int *warp_size) {
    register_name(kernel, name);
}

cudaError_t __cudaGetKernel(void **handle, const void *kernel) {
    *handle = (void *)kernel;
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t s) {
    call(kernel, KERNELS);
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(
    const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    call(kernel, KERNELS);
    return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **arguments) {
    call(kernel, KERNELS);
    return cudaSuccess;
}

static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    pushed.grid = grid;
    pushed.block = block;
    pushed.shared = shared;
    pushed.stream = stream;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *(void **)stream = pushed.stream;
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *kernel) {
    *attributes = (struct cudaFuncAttributes){
        .maxThreadsPerBlock = 1024,
        .numRegs = 32,
        .ptxVersion = 90,
        .binaryVersion = 90,
        .maxDynamicSharedSizeBytes = 232448,
    };
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *kernel, int block_size, size_t shared, unsigned flags) {
    *blocks = 2;
    return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    static void *memory;
    if (!memory)
        cudaMalloc(&memory, 1 << 20);
    *address = memory;
    return cudaSuccess;
}

/* --- Driver ------------------------------------------------------------------------------------------------------ */

static int do_nothing(void) {
    return 0;
}

cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *result) {
    void *found = dlsym(RTLD_DEFAULT, name);
    *function = found ? found : (void *)do_nothing;
    if (result)
        *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

static const char context; /* what a context points to */

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    if (flags)
        *flags = 0;
    *active = 1;
    return 0;
}

int cuDevicePrimaryCtxRetain(const void **handle, int device) {
    *handle = &context;
    return 0;
}

int cuCtxGetCurrent(const void **handle) {
    *handle = &context;
    return 0;
}

int cuCtxGetLimit(size_t *value, int limit) {
    *value = 0;
    return 0;
}

int cuGetErrorString(int error, const char **text) {
    *text = "error of the stub";
    return 0;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return 0;
}

int cuDeviceGetCount(int *count) {
    *count = num_devices();
    return 0;
}

int cuDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    return cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device); /* both number them alike */
}

int cuPointerGetAttribute(void **value, int attribute, void *address) {
    *value = address;
    return 0;
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) {
    *blocks = 2;
    return 0;
}

/* Compiled kernels, by their names. */
int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = strdup(name);
    register_name(*function, *function);
    return 0;
}

int cuLaunchKernel(const void *function) {
    call(function, KERNELS);
    return 0;
}

int cuLaunchCooperativeKernel(const void *function) {
    call(function, KERNELS);
    return 0;
}

int cuLaunchKernelEx(const void *config, const void *function) {
    call(function, KERNELS);
    return 0;
}

int cuStreamSynchronize(void *stream) {
    add(SYNCHRONIZATIONS);
    return 0;
}

/* --- cuBLAS and cuSOLVER ----------------------------------------------------------------------------------------- */

int cublasCreate_v2(void **handle) {
    return new_handle(handle);
}

int cublasGetPointerMode_v2(void *handle, int *mode) {
    *mode = 0;
    return 0;
}

int cublasGetMathMode(void *handle, int *mode) {
    *mode = 0;
    return 0;
}

size_t cublasLtGetVersion(void) {
    return 130100;
}

int cublasLtCreate(void **handle) {
    return new_handle(handle);
}

int cublasLtMatmulDescCreate(void **handle) {
    return new_handle(handle);
}

int cublasLtMatrixLayoutCreate(void **handle) {
    return new_handle(handle);
}

int cublasLtMatmulPreferenceCreate(void **handle) {
    return new_handle(handle);
}

typedef struct {
    unsigned long long algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
} Heuristic;

int cublasLtMatmulAlgoGetHeuristic(
    void *handle, void *description, void *a, void *b, void *c, void *d, void *preference, int requested,
    Heuristic *results, int *returned) {
    memset(results, 0, sizeof *results * requested);
    *returned = 1;
    return 0;
}

#define COUNTED(function, counter)          \
    int function(void) {                    \
        static const char name[] = #function; \
        register_name(name, name);          \
        call(name, counter);                \
        return 0;                           \
    }

COUNTED(cublasLtMatmul, PRODUCTS)
COUNTED(cublasGemmEx, PRODUCTS)
COUNTED(cublasGemmStridedBatchedEx, PRODUCTS)
COUNTED(cublasSgemm_v2, PRODUCTS)
COUNTED(cublasDgemm_v2, PRODUCTS)
COUNTED(cublasSgemmStridedBatched, PRODUCTS)
COUNTED(cublasDgemmStridedBatched, PRODUCTS)
COUNTED(cublasSgemv_v2, PRODUCTS)
COUNTED(cublasDgemv_v2, PRODUCTS)
COUNTED(cublasSgemmEx, PRODUCTS)
COUNTED(cublasSdot_v2, PRODUCTS)
COUNTED(cublasDotEx, PRODUCTS)

int cusolverDnCreate(void **handle) {
    return new_handle(handle);
}

int cusolverDnCreateParams(void **handle) {
    return new_handle(handle);
}

int cusolverDnCreateSyevjInfo(void **handle) {
    return new_handle(handle);
}

int cusolverDnXsyevBatched_bufferSize(
    void *handle, void *parameters, int mode, int part, long n, int type, void *a, long lda, int values_type,
    void *values, int compute_type, size_t *on_device, size_t *on_host, long batch) {
    *on_device = *on_host = 16;
    return 0;
}

int cusolverDnXsyevd_bufferSize(
    void *handle, void *parameters, int mode, int part, long n, int type, void *a, long lda, int values_type,
    void *values, int compute_type, size_t *on_device, size_t *on_host) {
    *on_device = *on_host = 16;
    return 0;
}

/* --- NCCL -------------------------------------------------------------------------------------------------------- */

int ncclGetVersion(int *version) {
    *version = 23007;
    return 0;
}

int ncclGetUniqueId(char *id) {
    memset(id, 7, 128);
    return 0;
}

int ncclCommInitRank(void **communicator) {
    return new_handle(communicator);
}

int ncclCommInitRankConfig(void **communicator) {
    return new_handle(communicator);
}

int ncclCommInitRankScalable(void **communicator) {
    return new_handle(communicator);
}

int ncclCommSplit(void *parent, int color, int key, void **communicator, void *config) {
    return new_handle(communicator);
}

int ncclCommGetAsyncError(void *communicator, int *error) {
    *error = 0;
    return 0;
}

const char *ncclGetErrorString(int error) {
    return "error of the stub";
}

const char *ncclGetLastError(void *communicator) {
    return "";
}

int ncclMemAlloc(void **start, size_t size) {
    return cudaMalloc(start, size);
}

int ncclMemFree(void *start) {
    return cudaFree(start);
}

COUNTED(ncclAllReduce, COLLECTIVES)
COUNTED(ncclAllGather, COLLECTIVES)
COUNTED(ncclReduceScatter, COLLECTIVES)
COUNTED(ncclBroadcast, COLLECTIVES)
COUNTED(ncclBcast, COLLECTIVES)
COUNTED(ncclReduce, COLLECTIVES)
COUNTED(ncclSend, COLLECTIVES)
COUNTED(ncclRecv, COLLECTIVES)
