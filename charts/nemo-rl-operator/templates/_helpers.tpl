{{/* Names, labels and images that several templates share. */}}

{{- define "nemo-rl.fullname" -}}
{{- default .Release.Name .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "nemo-rl.selector" -}}
app.kubernetes.io/name: nemo-rl-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "nemo-rl.labels" -}}
{{ include "nemo-rl.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: nemo-rl
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* The image of a section of values: repository, and tag or digest. Call with (dict "image" ... "root" $). */}}
{{- define "nemo-rl.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ default .root.Chart.AppVersion .image.tag }}
{{- end -}}
{{- end -}}

{{- define "nemo-rl.serviceAccount" -}}
{{- default (include "nemo-rl.fullname" .) .Values.serviceAccount.name -}}
{{- end -}}

{{/* Name of cluster-scoped objects: two releases of one name may live in different namespaces. */}}
{{- define "nemo-rl.clusterName" -}}
{{- $name := include "nemo-rl.fullname" . -}}
{{- if eq $name .Release.Namespace -}}{{ $name }}{{- else -}}{{ printf "%s:%s" .Release.Namespace $name }}{{- end -}}
{{- end -}}

{{- define "nemo-rl.testNamespace" -}}
{{- default (default .Release.Namespace (first .Values.watchNamespaces)) .Values.tests.namespace -}}
{{- end -}}

{{/* Security of all containers here: what the Pod Security level "restricted" asks, and a read-only root. */}}
{{- define "nemo-rl.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "nemo-rl.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}
